"""Every speed claim and every quality figure, each with the one command that measures it."""
