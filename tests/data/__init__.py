"""Tests of famjax/data."""
