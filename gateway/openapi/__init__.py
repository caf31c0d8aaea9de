"""What is served, as an OpenAPI document: made of the route table, the functions behind it, and the bounds in `wire`."""
