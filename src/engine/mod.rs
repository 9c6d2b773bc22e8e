//! What runs the roles.
//!
//! - [`host`]: CPU threads drive the state machines of `proto`.

pub mod host;
