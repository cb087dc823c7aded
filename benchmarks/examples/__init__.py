"""Small programs to start from, one for each job; the tests run them all."""
