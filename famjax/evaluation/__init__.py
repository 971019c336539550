"""Measuring trained models: tasks, reports and plots."""
