"""Tests of other projects, run on our functions."""
