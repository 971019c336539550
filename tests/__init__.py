"""Tests of famjax; the folders mirror famjax/."""
