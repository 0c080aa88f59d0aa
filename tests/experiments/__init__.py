"""Tests of fambav.experiments."""
