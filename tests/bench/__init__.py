"""Tests of fambav.bench."""
