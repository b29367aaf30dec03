"""Programs to run on a host: kernel validation, and helpers of the Makefile."""
