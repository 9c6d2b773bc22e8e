//! Recorded routing in, obvious results out: what replays, tests and examples compare the library with.
//!
//! - [`trace`]: routing recorded from real text, as safetensors.
//! - [`experts`]: test experts whose outputs depend on everything a dispatch must get right.
//! - [`oracle`]: what every rank must receive and get back, computed the obvious way.
//! - [`verify`](mod@verify): compares the two, bit for bit.
//! - [`dump`]: what a rank received and combined, as safetensors, for other checkers.

pub mod dump;
pub mod experts;
pub mod oracle;
pub mod trace;
pub mod verify;
