"""The database: conversations, feedback, people and policy versions. All SQL of kibitz is in this package."""
