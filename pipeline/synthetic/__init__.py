"""Chest films drawn from anatomy and findings, and a CheXpert of them."""
