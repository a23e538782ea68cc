"""The only code that names SQLAlchemy's private parts, with the contract that checks them at import."""
