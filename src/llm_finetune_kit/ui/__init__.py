"""The browser page: four tabs over run folders. It asks with a config, starts the command line and reads what runs said."""
