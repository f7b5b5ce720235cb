"""The recipes that ship with the tool, as data: one YAML file each."""
