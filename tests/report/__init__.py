"""Tests of fambav.report."""
