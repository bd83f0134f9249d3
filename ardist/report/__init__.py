"""What a person looks at: tables, figures and the report of a run."""
