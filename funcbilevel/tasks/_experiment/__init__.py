"""What all experiments share: options, the store of finished runs, the grid, selection, tables, figures."""
