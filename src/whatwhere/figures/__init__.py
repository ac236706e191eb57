"""What all figures share: colours, settings of matplotlib, axes. Importing it imports nothing."""
