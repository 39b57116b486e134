"""What training costs on many machines: counted, measured on one core, predicted, and checked with two processes."""
