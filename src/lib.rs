//! railhop

pub mod api;
pub mod config;
pub mod engine;
pub mod error;
pub mod fabric;
pub mod numeric;
pub mod proto;
pub mod reference;
mod sync;
pub mod topology;
pub mod wire;

pub use api::*;
pub use config::{Config, ConfigBuilder};
pub use error::Error;
pub use numeric::ScaleFormat;
pub use topology::{ExpertPlacement, Topology};
pub use wire::shape::{RowFormat, RowShape};
