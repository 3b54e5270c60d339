//! The real engine with a real model, for the tests and the demo.

pub mod bed;
pub mod engine;
pub mod model;
pub mod request;
pub mod server;
