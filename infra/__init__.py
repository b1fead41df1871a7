"""The machinery around the recipe, which a reader of the recipe may skip."""
