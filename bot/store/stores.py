"""Open the database that a config names, with its stores."""

from bot.config import Config
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.registry import PolicyRegistry


def open_stores(config: Config) -> tuple[Database, ConversationStore, PolicyRegistry]:
    """Return the database, migrated to this program's schema, with its stores."""
    database = Database(config.database_url, config.data)
    database.upgrade()
    return database, ConversationStore(database), PolicyRegistry(database)
