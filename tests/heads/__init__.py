"""Tests; see conftest.py for what they share."""
