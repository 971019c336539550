"""Tests of famjax/model, against the slow reference in reference.py."""
