"""Synthetic chest X-rays, and a CheXpert made of them."""
