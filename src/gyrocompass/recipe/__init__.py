"""A whole run as typed config: stages, the plan that caches them by content, and the report."""
