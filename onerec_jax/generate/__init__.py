"""Generation: from a request's context to semantic IDs, and from those to items."""
