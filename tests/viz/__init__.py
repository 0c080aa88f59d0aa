"""Tests of fambav.viz."""
