"""A model looked at: which angles it meets, what its positions cost, what it retrieves."""
