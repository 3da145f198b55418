"""The stages that ship with gradmap-pipeline, one method a file, found through entry points as any plugin is."""
