"""Files that anybody may have made, read within bounds; and who may write where. Begin with bounded_json.py."""
