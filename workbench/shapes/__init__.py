"""A model as shapes only: bytes and multiply-adds of a recipe, without weights."""
