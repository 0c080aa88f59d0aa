"""Tests of fambav.search."""
