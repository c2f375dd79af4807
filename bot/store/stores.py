"""Stores: the database that a config names, with what stands on it."""

from bot.config import Config
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.registry import PolicyRegistry


def open_stores(config: Config) -> tuple[Database, ConversationStore, PolicyRegistry]:
    """Return the database at this program's schema, with the stores on it."""
    database = Database(config.database_url, config.data)
    database.upgrade()
    return database, ConversationStore(database), PolicyRegistry(database)
