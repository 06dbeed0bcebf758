"""Scripts behind the published figures; not part of the installed package."""
