//! Objects from files, as `kubectl` takes and prints them: YAML or JSON, several documents, lists.

use super::objects::{
    Gateway, GatewayClass, GlooTrafficPolicy, GrpcRoute, HttpRoute, Ingress, IngressClass, ListenerSet,
    Namespace, ReferenceGrant, TrafficPolicy, XListenerSet,
};
use super::objects::{Key, Kind, Manifest, World, for_each_kind};
use serde::Deserialize as _;
use serde_json::Value;
use std::{path::Path, sync::Arc};

/// What a file had, beside objects that are known.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// Objects that were taken.
    pub objects: usize,
    /// Kinds that say nothing about preflights.
    pub others: usize,
}

/// Whether a file's name says that it holds manifests.
pub fn is_manifest(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| ["yaml", "yml", "json"].iter().any(|known| e.eq_ignore_ascii_case(known)))
}

/// Reads all objects of a text into a world; a later one replaces an earlier one of the same name.
///
/// # Errors
/// It is neither YAML nor JSON, or a document is no object: says where.
pub fn read(text: &str, world: &mut World) -> Result<Read, String> {
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|e| format!("it is neither YAML nor JSON: {e}"))?;
    let mut read = Read::default();
    for (number, document) in documents.into_iter().enumerate() {
        if !document.is_null() {
            take(&document, world, &mut read).map_err(|e| format!("its document {} {e}", number + 1))?;
        }
    }
    Ok(read)
}

fn take(document: &Value, world: &mut World, read: &mut Read) -> Result<(), String> {
    let text = |name: &str| document.get(name).and_then(Value::as_str);
    let (Some(version), Some(kind)) = (text("apiVersion"), text("kind")) else {
        return Err("is no Kubernetes object: it has no apiVersion, or no kind".to_owned());
    };
    let group = version.split_once('/').map_or("", |(group, _)| group).to_owned();
    let kind = kind.to_owned();
    if kind.ends_with("List")
        && let Some(items) = document.get("items").and_then(Value::as_array)
    {
        for item in items {
            let mut item = item.clone();
            // Items of a typed list have no kind of their own.
            if let Value::Object(fields) = &mut item {
                fields.entry("apiVersion").or_insert_with(|| version.into());
                fields.entry("kind").or_insert_with(|| kind.trim_end_matches("List").into());
            }
            take(&item, world, read)?;
        }
        return Ok(());
    }
    macro_rules! try_kind {
        ($name:ident) => {
            if kind == <$name as Kind>::KIND && group == <$name as Kind>::GROUP {
                add::<$name>(document, world)?;
                read.objects += 1;
                return Ok(());
            }
        };
    }
    for_each_kind!(try_kind);
    read.others += 1;
    Ok(())
}

fn add<K: Kind>(document: &Value, world: &mut World) -> Result<(), String> {
    match Manifest::<K>::deserialize(document) {
        Ok(manifest) => {
            let object = manifest.object();
            if object.meta.name.is_empty() {
                return Err(format!("is a {} without metadata.name", K::KIND));
            }
            K::of_mut(world).insert(object.key(), Arc::new(object));
        }
        Err(error) => {
            let name = |field: &str| document.pointer(field).and_then(Value::as_str).unwrap_or_default();
            let namespace = match name("/metadata/namespace") {
                "" if K::NAMESPACED => "default",
                other => other,
            };
            let key = Key::new(namespace, name("/metadata/name"));
            world.unreadable.insert((K::KIND, key), error.to_string());
        }
    }
    Ok(())
}
