//! What is saved comes back as it was: by all states that can be reached, what is refused, and what it costs.

mod cost;
mod identity;
mod refusals;
mod world;
