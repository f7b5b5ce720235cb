"""Compares exports of one checkpoint on the same questions, and on the same images without any labels."""
