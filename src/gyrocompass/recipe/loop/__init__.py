"""Continuous learning: what people decided becomes a challenger, which is judged, tried and kept or not."""
