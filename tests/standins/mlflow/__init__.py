"""Stands in for the package mlflow: the calls of its client that are used, written into a journal."""
