"""Controls that make a recipe: model, sliders, steps, layers of their own, presets."""
