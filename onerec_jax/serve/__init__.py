"""A server to try an export directory with, and to load-test it: `onerec serve DIR`."""
