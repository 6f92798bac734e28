"""What people read about models: tables for the terminal, pictures, and a page of HTML."""
