"""How fast this code is: measured cases, what they are held against, and the pages made from the record."""
