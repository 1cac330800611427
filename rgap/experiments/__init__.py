"""What each notebook measures and how it draws it; only here and in notebooks do attack and truth meet."""
