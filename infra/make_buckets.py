"""Make the named buckets in the S3-compatible store at `AWS_ENDPOINT_URL`; those that exist are left as they are.

python infra/make_buckets.py BUCKET …
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


def main(buckets: Sequence[str]) -> int:
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not buckets or not endpoint:
        sys.stderr.write("error: give the buckets' names, and the store's address in AWS_ENDPOINT_URL\n")
        return 2
    settings = Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 5, "mode": "standard"})
    try:
        store = boto3.client("s3", endpoint_url=endpoint, config=settings)
        existing = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
        for bucket in buckets:
            if bucket not in existing:
                store.create_bucket(Bucket=bucket)
            sys.stdout.write(f"{bucket}: {'was there' if bucket in existing else 'made'}\n")
    except (BotoCoreError, ClientError) as error:
        sys.stderr.write(f"error: {endpoint}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
