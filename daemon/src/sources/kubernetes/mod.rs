//! Policies from Kubernetes objects: HTTPRoutes with kgateway's policies, and Ingresses of ingress-nginx; read from manifests
//! or from the API server.

#[cfg(feature = "kubernetes")]
pub mod client;
#[cfg(feature = "kubernetes")]
mod events;
pub mod export;
pub mod manifests;
pub mod objects;
pub mod resolve;
mod state;

pub use state::State;
