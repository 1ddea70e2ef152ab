"""Contracts: one file per room, run over everything that is registered in it."""
