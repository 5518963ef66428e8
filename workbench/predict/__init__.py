"""What a recipe will give before it is measured, and how good such predictions were."""
