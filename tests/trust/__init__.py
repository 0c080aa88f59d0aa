"""Promises of reliability, each kept by breaking something."""
