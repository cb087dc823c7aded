"""Small programs to begin from, one for each job; the tests run them."""
