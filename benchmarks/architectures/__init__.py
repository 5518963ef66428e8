"""Tiny random models of many architectures, and what every family of method does to them."""
